"""One file for each change of the lay-out, in order; a file that was released is never edited."""
