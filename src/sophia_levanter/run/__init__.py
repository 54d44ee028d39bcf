"""The life cycle of a training run: its directory, its components, and how it starts, resumes and ends."""
