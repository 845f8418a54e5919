"""Vocabularies spread over ranks: pure steps, and one thin exchange between them."""
