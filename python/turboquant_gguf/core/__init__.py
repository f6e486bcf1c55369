"""What every program needs: child processes, signals, output files, progress, units."""
