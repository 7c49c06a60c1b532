"""What a cold start needs of an AWS SDK: request signing, credentials and secrets. Imports no boto3."""
