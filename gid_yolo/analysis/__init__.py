"""What a researcher looks at: the paper's figures."""
