"""Where teacher values come from, whose pieces they are about, and how they are kept."""
