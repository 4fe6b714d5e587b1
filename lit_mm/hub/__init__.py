"""Models come in and go out: trained runs as models that answer."""
