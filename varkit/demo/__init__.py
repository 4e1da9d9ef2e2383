"""The web page of varkit: `varkit demo`, or `python app.py` from a checkout. Needs `pip install "varkit[app]"`."""
