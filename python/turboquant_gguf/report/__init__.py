"""A file of measurements, shown: tables, figures, CSV, a page."""
