"""From files to a topic: readers of data sets, the resumable publisher, and export."""
