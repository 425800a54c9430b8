"""`bigembed demo`: an n-gram memory of 200 million rows, trained on real text in about a minute.

text finds and reads files, tokens makes integers of them, ngrams turns positions into ids, model holds the small torch
model, run puts them around one `bigembed.Embedding`, report says what came of it, options what a user can choose.
"""
