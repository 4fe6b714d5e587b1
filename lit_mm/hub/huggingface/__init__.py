"""What `export` copies into its folders: transformers' classes for a trained model, which need no lit_mm. In the copy,
imports from this package become relative."""
