"""Vocabularies spread over ranks, which are threads of one process but in `test_processes`."""
