"""Runs in tables and pictures, from the files that they leave."""
