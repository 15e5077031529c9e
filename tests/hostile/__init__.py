"""Tests of hostile days: death at any write, full and vanished disks, and broken or malicious inputs."""
