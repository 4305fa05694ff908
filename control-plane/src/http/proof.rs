//! Who calls over plain HTTP: the password of basic authentication is a token. The name beside it
//! is whatever the client likes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use http::HeaderMap;
use http::header::AUTHORIZATION;
use latchkey_proto::v1::Reason;
use secrecy::SecretString;
use zeroize::Zeroizing;

use crate::error::{Error, Result};

/// Reads the token out of the headers.
pub(super) fn token(headers: &HeaderMap) -> Result<SecretString> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    // More than one is somebody's trick.
    let (Some(value), None) = (values.next(), values.next()) else { return Err(required()) };
    let encoded = value.as_bytes().split_at_checked(6);
    let encoded = encoded.filter(|(scheme, _)| scheme.eq_ignore_ascii_case(b"Basic "));
    let (_, encoded) = encoded.ok_or_else(required)?;
    let decoded = Zeroizing::new(STANDARD.decode(encoded).map_err(|_| required())?);
    let text = std::str::from_utf8(&decoded).map_err(|_| required())?;
    let (_, token) = text.split_once(':').ok_or_else(required)?;
    Ok(SecretString::from(token))
}

fn required() -> Error {
    let message = "give a user's token as the password: TF_HTTP_USERNAME and TF_HTTP_PASSWORD, as \
                   `latchkey state backend-config` prints them";
    Error::refused(Reason::IdentityRequired, message)
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use secrecy::ExposeSecret;

    use super::*;

    fn read(values: &[&str]) -> Option<String> {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(AUTHORIZATION, HeaderValue::from_str(value).unwrap());
        }
        token(&headers).ok().map(|token| token.expose_secret().to_owned())
    }

    #[test]
    fn the_password_is_the_token_whatever_the_name_is() {
        let basic = |text: &str| format!("Basic {}", STANDARD.encode(text));
        assert_eq!(read(&[&basic("ada:lk_1")]).as_deref(), Some("lk_1"));
        assert_eq!(read(&[&basic(":lk_1:x")]).as_deref(), Some("lk_1:x"));
        assert_eq!(read(&[&basic("ada:lk_1").replace("Basic", "basic")]).as_deref(), Some("lk_1"));
        for refused in
            [&[][..], &["Bearer lk_1"], &["Basic"], &["Basic !"], &[&basic("lk_1")], &["é"]]
        {
            assert_eq!(read(refused), None, "{refused:?}");
        }
        assert_eq!(read(&[&basic("ada:lk_1"), &basic("ada:lk_1")]), None);
    }
}
