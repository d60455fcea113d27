"""Data: text to token shards, token shards to sequences. It is told its rank and the number of ranks as two ints."""
