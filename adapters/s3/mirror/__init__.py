"""The writing side of the S3 mirror: uploads each model from Hugging Face once. Only this package and infra import
boto3."""
