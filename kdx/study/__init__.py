"""Studies: grids of teachers, students, methods, seeds and data sets, trained, explained and collected in one table."""
