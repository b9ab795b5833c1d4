"""Training: begins and resumes runs, takes their steps, and writes their directories."""
