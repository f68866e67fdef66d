"""Processes: who this rank is, how ranks are started, find each other, agree, and end."""
