"""The console: a server-rendered web page for operators and first-time visitors.

app               `ratchet console`: the stateless application and its process
security          rules for every request: host, size, session, headers, path prefix
public            read-only mode without keys
request_context   a request's visitor, rights and rendering
data              ledger, artifacts, sample store, and the server over HTTP
timeline          history of releases, and the guard's view
action_preview    effect of an operator's action, in words
template_filters  formats of numbers, times and names
pages/            a module per page
"""
