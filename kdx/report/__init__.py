"""The page of a run, its pictures and its text, and the table for a terminal."""
