"""The slow twin of the log of tokens: a list of (row, token), and what of it counts."""


class TokenLog:
    """Tokens as of now, of the last commit, and of the last explicit one."""

    def __init__(self, num_rows):
        self.now, self.head, self.retained = [], [], []
        self.rows_now = self.rows_head = self.rows_retained = num_rows

    def append(self, tokens, first_row):
        self.now += [(first_row + m, token) for m, token in enumerate(tokens)]

    def grow(self, num_rows):
        self.rows_now = num_rows

    def commit(self, explicit=True):
        """Only what has a row counts; the rest may count with a later commit."""
        self.rows_head = self.rows_now
        self.head = [entry for entry in self.now if entry[0] < self.rows_head]
        if explicit:
            self.retained, self.rows_retained = list(self.head), self.rows_head

    def drop(self):
        self.now, self.rows_now = list(self.head), self.rows_head

    def rollback(self):
        self.now, self.rows_now = list(self.retained), self.rows_retained
        self.commit()
