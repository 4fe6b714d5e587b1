"""`python -m lit_mm profile`: the costs of the models in configs, without weights."""
