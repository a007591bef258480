"""Settings of identity providers: sources of tokens, and sign-in."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator

from core.settings.section import Section, http_url


class OAuth(Section):
    """Bearer tokens for SASL OAUTHBEARER: from a token endpoint (client credentials), or from a file."""

    token_url: str = Field("", description="Token endpoint of the identity provider (client-credentials grant).")
    client_id: str = Field("", description="Client ID for the token endpoint.")
    client_secret: SecretStr | None = Field(None, description="Client secret for the token endpoint.")
    scope: str = Field("", description="Scope to request; empty: the provider's default.")
    token_file: Path | None = Field(None, description="File with a token; read for each connection.")
    extensions: dict[str, str] = Field(default_factory=dict, description="SASL extensions sent with the token.")

    @property
    def enabled(self) -> bool:
        return bool(self.token_url or self.token_file)

    _url = field_validator("token_url")(http_url)

    @model_validator(mode="after")
    def _one_source(self) -> OAuth:
        if self.token_url and self.token_file:
            raise ValueError("set token_url or token_file, not both")
        for name, value in self.extensions.items():
            if not (name.isascii() and name.isalpha() and name != "auth" and value.isascii() and value.isprintable()):
                raise ValueError(f"extension {name!r}: a name has letters only, a value printable ASCII (RFC 7628)")
        return self


class Oidc(Section):
    """Sign-in to the console by an OpenID Connect provider, next to API keys."""

    issuer: str = Field("", description="Issuer URL of the provider, e.g. https://id.example.com; empty: no sign-in.")
    client_id: str = Field("", description="Client ID of the console.")
    client_secret: SecretStr | None = Field(None, description="Client secret; leave unset for a public client (PKCE).")
    console_url: str = Field(
        "", description="URL of the console in a browser; the redirect URL is this plus /sign-in/oidc/done."
    )
    scope: str = Field("openid email profile", description="Scopes to request.")
    name_claim: str = Field("email", description="Claim with the user name for the audit log.")
    groups_claim: str = Field("groups", description="Claim with the groups of a user.")
    trust_emails: bool = Field(
        False, description="Accept email addresses without email_verified. Safe only if users cannot choose theirs."
    )
    readers: list[str] = Field(
        default_factory=list, description="Users who may read and try models; '*': everyone who can sign in."
    )
    reader_groups: list[str] = Field(default_factory=list, description="Groups whose members are readers.")
    operators: list[str] = Field(default_factory=list, description="Users who are operators.")
    operator_groups: list[str] = Field(default_factory=list, description="Groups whose members are operators.")

    @property
    def enabled(self) -> bool:
        return bool(self.issuer)

    _urls = field_validator("issuer", "console_url")(http_url)

    @model_validator(mode="after")
    def _whole(self) -> Oidc:
        if self.enabled and not (self.client_id and self.console_url):
            raise ValueError("with issuer set client_id and console_url, too")
        if self.enabled and not (self.readers or self.reader_groups or self.operators or self.operator_groups):
            raise ValueError("with issuer set also readers, operators or groups of them: no one could sign in")
        if "*" in (*self.operators, *self.operator_groups, *self.reader_groups):
            raise ValueError("'*' is for readers alone: name operators and groups")
        return self
