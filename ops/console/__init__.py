"""The console: a web page for operators and first-time visitors, rendered on the server.

command   `ratchet console`: a process of its own, without state
app       the application: routes, and what every page shares
guard     what holds for every request: host, size, session, security headers
sessions  the signed-in visitor, in one encrypted cookie
desk      where the facts come from: ledger, artifacts, sample store, and the server over HTTP
visit     one request: who asks, what he may do, and how the answer is drawn
pages/    a module for each page; facts about releases and learning in timeline and learning; charts draws
"""
