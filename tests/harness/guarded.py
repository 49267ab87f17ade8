"""A small repository whose functions are guarded, for tests of `seqscale check`."""

import subprocess

FAST = """
import time


def scan(x):
    time.sleep(0.002)
    return x.cumsum(0)
"""
SLOW = FAST.replace("0.002", "0.003")
GUARDS = """
import torch
from harness.guards import Guard
from mine import scan

GUARDS = [
    Guard("scan", scan, lambda: (torch.arange(8.0),), lambda x: x.cumsum(0)),
    Guard("scan twice", lambda x: scan(scan(x)), lambda: (torch.arange(8.0),)),
]
"""


def git(place, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org")
    subprocess.run(["git", "-C", place, *who, *arguments], check=True, capture_output=True)


def commit(place, message="as it is"):
    git(place, "add", "-A")
    git(place, "commit", "-qm", message)
