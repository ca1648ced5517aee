"""Long sampling runs over many processes: what sample_ddp.py is made of."""
