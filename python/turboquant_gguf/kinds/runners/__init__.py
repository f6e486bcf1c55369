"""What measures: programs and libraries that run a model. Imported by a kind when it measures, never by a report."""
