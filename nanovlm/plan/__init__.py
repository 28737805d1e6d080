"""What a full-size run would need, before a GPU is paid for: `python -m nanovlm.plan --help`."""
