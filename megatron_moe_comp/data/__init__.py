"""Text to what Megatron trains on: a SentencePiece tokenizer and .bin/.idx pairs.

    corpora.py          where documents come from: the standard library, text files, JSONL
      -> splits.py      which documents train, validate and test
      -> tokenizer.py   a SentencePiece model trained on the training documents alone
      -> encoding.py    documents to token ids, in worker processes, in order
      -> token_files.py the ids in Megatron's indexed format (the only import of Megatron here)
      -> outputs.py     names, lock, manifest, and how finished files appear under their names

``options.py`` holds what the user can choose, ``pipeline.py`` runs the whole line, and
``prepare.py`` is the command: ``python -m megatron_moe_comp.data.prepare --help``.

``rebuild.py`` makes the files of a prefix once, for both pipelines.

For sequence-to-sequence training, pairs of an input and a target text, one JSON object a line:

    pairs/glue.py       the tasks of GLUE as text, from local files; a command
    pairs/function_tasks.py  functions of Python source and what is asked about them
      -> pairs/pipeline.py  their split and tokenizer, and ``prepare_pairs.py`` is the command
    t5_tokenizer.py     T5's view of a SentencePiece model
      -> pairs/reader.py  a file of pairs as token ids in memory
"""
