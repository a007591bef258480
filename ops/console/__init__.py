"""The console: a web page for operators and first-time visitors, rendered on the server.

run_console       `ratchet console`: a process of its own, without state
app               the application: routes, and what every page shares
security          what holds for every request: host, size, session, security headers
path_prefix       links and redirects where a proxy serves the console under a path
public            the read-only mode without a key: methods, request rate, what is left out
shared_pages      one answer of a page for all visitors of the public mode
sessions          the signed-in visitor, in one encrypted cookie
data              where the facts come from: ledger, artifacts, sample store, and the server over HTTP
request_context   one request: who asks, what they may do, and how the answer is rendered
template_filters  how facts are written: numbers, times, names
pages/            a module for each page
                  facts for them: timeline, rollout, update_summaries, served, stream; plots: charts
action_preview    what an operator's action will do, in words, before it is done
tour              the steps of the tour of a first visit
"""
