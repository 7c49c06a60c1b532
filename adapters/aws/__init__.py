"""Request signing, credentials and secrets for a cold start, without boto3."""
