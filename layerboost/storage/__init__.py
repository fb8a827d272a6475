"""Writes files to disks and object stores completely or not at all, and retries after network failures."""
