"""The life cycle of a training run: its directory, its parts, and how it starts, resumes and ends."""
