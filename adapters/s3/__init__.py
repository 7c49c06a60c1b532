"""S3 as a source of models, read without boto3. `adapters.s3.mirror` writes the mirror with boto3."""
