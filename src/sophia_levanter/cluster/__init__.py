"""Runs on many hosts: what starts their processes, notices that one is gone, and starts them again."""
