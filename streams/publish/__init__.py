"""From files to a topic: data set readers, the resumable publisher, and export."""
