"""Methods that SepLLM is compared with and that are not served: references on Transformers.

They decide from scores, or share keys between layers, so a serving engine would lose prefix caching
or pages of one size. None of this imports vLLM.
"""
