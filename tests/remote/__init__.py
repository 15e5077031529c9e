"""Tests of files at URLs."""
