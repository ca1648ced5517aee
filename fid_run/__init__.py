"""What sample_ddp.py is made of: one job, its record, its images, its labels and the sampling of batches."""
