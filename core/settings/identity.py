"""Settings of identity providers: sources of tokens, and sign-in."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, SecretStr, field_validator, model_validator

from core.settings.section import Section, http_url


class OAuth(Section):
    """Bearer tokens for SASL OAUTHBEARER: from a token endpoint (client credentials), or from a file."""

    token_url: str = Field("", description="Token endpoint of the identity provider (client-credentials grant).")
    client_id: str = Field("", description="Client id for the token endpoint.")
    client_secret: SecretStr | None = Field(None, description="Client secret for the token endpoint.")
    scope: str = Field("", description="Scope that the token is asked for; empty: the provider's default.")
    token_file: Path | None = Field(None, description="File with a token, read again for each connection.")
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

    issuer: str = Field(
        "", description="URL of the provider, as it names itself (https://id.example.com); empty: none."
    )
    client_id: str = Field("", description="Client id that the provider gave to the console.")
    client_secret: SecretStr | None = Field(None, description="Client secret; none for a public client (PKCE).")
    console_url: str = Field(
        "",
        description="URL under which browsers reach the console, for the way back: + /sign-in/oidc/done.",
    )
    scope: str = Field("openid email profile", description="Scopes that the provider is asked for.")
    name_claim: str = Field("email", description="Claim that names a person in the audit log.")
    groups_claim: str = Field("groups", description="Claim with the groups of a person.")
    trust_emails: bool = Field(
        False,
        description="Accept addresses without email_verified: true. Only where users cannot choose them (Entra ID).",
    )
    readers: list[str] = Field(
        default_factory=list, description="People who may read and try models; '*': everyone who can sign in."
    )
    reader_groups: list[str] = Field(default_factory=list, description="Groups whose members may do the same.")
    operators: list[str] = Field(default_factory=list, description="People who may also act as operators.")
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
