"""Tests of faults: processes that die at any write, full and vanished disks, and damaged or malicious inputs."""
