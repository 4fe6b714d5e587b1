"""`python -m lit_mm profile`: what configured models cost, before they exist."""
