"""Place arrays on devices, and communicate between the processes of a run."""
