"""The console: a web page for operators and first-time visitors, rendered on the server.

app               `ratchet console`: the application and its process, which has no state
security          what holds for every request: host, size, session, headers, and the path of a proxy
public            the read-only mode without a key: methods, request rate, what is left out, answers that are shared
request_context   one request: who asks, what they may do, and how the answer is rendered
data              where the facts come from: ledger, artifacts, sample store, and the server over HTTP
timeline          releases as a story; what the guard watches, and what it took back
action_preview    what an operator's action will do, in words, before it is done
template_filters  how facts are written: numbers, times, names
pages/            a module for each page
"""
