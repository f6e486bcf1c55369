"""The one exception a user is meant to read."""


class TurboquantError(Exception):
    """Something the user can mend. The message says in one or two sentences what is wrong and what to do.

    details: lines that help to find the cause (the end of a log), printed below the message; may be empty.
    exit_code: what the command line exits with: 1, or 2 where the command itself was wrong.
    """

    exit_code = 1

    def __init__(self, message: str, details: str = ""):
        super().__init__(message)
        self.details = details
