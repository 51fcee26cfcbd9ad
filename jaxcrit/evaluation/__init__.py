"""What a model scores on data: losses."""
