//! AWS Signature Version 4, the verifier's half: canonical request, string to sign, key.
//!
//! Pure functions over strings. Who may use which key, and when, is `credentials`' business.

use aws_lc_rs::{digest, hmac};
use axum::http::HeaderMap;
use subtle::ConstantTimeEq;

use crate::encoding::{Keep, percent_decode, uri_encode, uri_pairs};

/// The name of the only algorithm there is.
pub const ALGORITHM: &str = "AWS4-HMAC-SHA256";

/// What the `Authorization` header says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    pub access_key_id: String,
    pub scope: Scope,
    pub signed_headers: Vec<String>,
    pub signature: String,
}

/// What a signature is good for: a day, a region, a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scope {
    pub date: String,
    pub region: String,
    pub service: String,
}

impl Authorization {
    /// Reads the header; the error says what is missing, in AWS's words.
    pub fn parse(header: &str) -> Result<Self, String> {
        let rest = header
            .strip_prefix(ALGORITHM)
            .ok_or("Authorization header requires 'AWS4-HMAC-SHA256' algorithm.")?;
        let field = |name: &str| {
            rest.split(',')
                .filter_map(|part| part.trim().split_once('='))
                .find(|(key, _)| *key == name)
                .map(|(_, value)| value)
                .ok_or_else(|| format!("Authorization header requires '{name}' parameter."))
        };
        let credential: Vec<&str> = field("Credential")?.split('/').collect();
        let [key, date, region, service, "aws4_request"] = credential[..] else {
            return Err("Credential must have exactly 5 slash-delimited elements.".to_owned());
        };
        Ok(Self {
            access_key_id: key.to_owned(),
            scope: Scope {
                date: date.to_owned(),
                region: region.to_owned(),
                service: service.to_owned(),
            },
            signed_headers: field("SignedHeaders")?.split(';').map(str::to_owned).collect(),
            signature: field("Signature")?.to_owned(),
        })
    }
}

impl Scope {
    fn text(&self) -> String {
        format!("{}/{}/{}/aws4_request", self.date, self.region, self.service)
    }
}

/// Builds the canonical request; `path` and `query` are as they stood on the request line.
pub fn canonical_request(
    method: &str,
    path: &str,
    query: &str,
    headers: &HeaderMap,
    signed_headers: &[String],
    payload_hash: &str,
) -> String {
    let path = uri_encode(&percent_decode(path), Keep::Slash);
    let mut pairs: Vec<(String, String)> = uri_pairs(query)
        .into_iter()
        .map(|(key, value)| (uri_encode(&key, Keep::Nothing), uri_encode(&value, Keep::Nothing)))
        .collect();
    pairs.sort();
    let query: Vec<String> = pairs.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let mut lines = String::new();
    for name in signed_headers {
        let values: Vec<String> = headers
            .get_all(name.as_str())
            .iter()
            .map(|value| {
                let text = String::from_utf8_lossy(value.as_bytes()).into_owned();
                text.split_whitespace().collect::<Vec<_>>().join(" ")
            })
            .collect();
        lines.push_str(&format!("{name}:{}\n", values.join(",")));
    }
    let names = signed_headers.join(";");
    format!("{method}\n{path}\n{}\n{lines}\n{names}\n{payload_hash}", query.join("&"))
}

/// Builds the string that is signed for a canonical request.
pub fn string_to_sign(time: &str, scope: &Scope, canonical_request: &str) -> String {
    let digest = sha256_hex(canonical_request.as_bytes());
    format!("{ALGORITHM}\n{time}\n{}\n{digest}", scope.text())
}

/// Builds the string that is signed for one chunk of a signed `aws-chunked` body.
pub fn chunk_string_to_sign(time: &str, scope: &Scope, previous: &str, chunk: &[u8]) -> String {
    let (empty, digest) = (sha256_hex(b""), sha256_hex(chunk));
    format!("{ALGORITHM}-PAYLOAD\n{time}\n{}\n{previous}\n{empty}\n{digest}", scope.text())
}

/// Builds the string that is signed for the trailer of a signed `aws-chunked` body.
pub fn trailer_string_to_sign(time: &str, scope: &Scope, previous: &str, trailer: &[u8]) -> String {
    let digest = sha256_hex(trailer);
    format!("{ALGORITHM}-TRAILER\n{time}\n{}\n{previous}\n{digest}", scope.text())
}

/// Derives the key for a scope from a secret access key.
pub fn signing_key(secret: &str, scope: &Scope) -> hmac::Key {
    let mut key = hmac::Key::new(hmac::HMAC_SHA256, format!("AWS4{secret}").as_bytes());
    for part in [scope.date.as_str(), &scope.region, &scope.service, "aws4_request"] {
        let tag = hmac::sign(&key, part.as_bytes());
        key = hmac::Key::new(hmac::HMAC_SHA256, tag.as_ref());
    }
    key
}

/// Signs a string, in hexadecimal.
pub fn sign(key: &hmac::Key, string_to_sign: &str) -> String {
    hex::encode(hmac::sign(key, string_to_sign.as_bytes()))
}

/// Compares a presented signature with the right one, in constant time.
pub fn verify(key: &hmac::Key, string_to_sign: &str, presented: &str) -> bool {
    sign(key, string_to_sign).as_bytes().ct_eq(presented.as_bytes()).into()
}

/// Hashes bytes the way every part of a signature does.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hex::encode(digest::digest(&digest::SHA256, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())).collect()
    }

    fn scope(date: &str, service: &str) -> Scope {
        Scope { date: date.to_owned(), region: "us-east-1".to_owned(), service: service.to_owned() }
    }

    fn names(text: &str) -> Vec<String> {
        text.split(';').map(str::to_owned).collect()
    }

    #[test]
    fn the_published_iam_example_is_reproduced() {
        let headers = headers(&[
            ("content-type", "application/x-www-form-urlencoded; charset=utf-8"),
            ("host", "iam.amazonaws.com"),
            ("x-amz-date", "20150830T123600Z"),
        ]);
        let canonical = canonical_request(
            "GET",
            "/",
            "Action=ListUsers&Version=2010-05-08",
            &headers,
            &names("content-type;host;x-amz-date"),
            &sha256_hex(b""),
        );
        assert_eq!(
            sha256_hex(canonical.as_bytes()),
            "f536975d06c0309214f805bb90ccff089219ecd68b2577efef23edd43b7e1a59"
        );
        let scope = scope("20150830", "iam");
        let key = signing_key("wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY", &scope);
        let text = string_to_sign("20150830T123600Z", &scope, &canonical);
        assert_eq!(
            sign(&key, &text),
            "5d672d79c15b13162d9279b0855cfba6789a8edb4c82c400e06b5924a6f2b5d7"
        );
        assert!(!verify(&key, &text, "5d672d79"));
    }

    #[test]
    fn the_published_s3_examples_are_reproduced() {
        let empty = sha256_hex(b"");
        let scope = scope("20130524", "s3");
        let key = signing_key("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", &scope);
        let with_range = headers(&[
            ("host", "examplebucket.s3.amazonaws.com"),
            ("range", "bytes=0-9"),
            (
                "x-amz-content-sha256",
                "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            ),
            ("x-amz-date", "20130524T000000Z"),
        ]);
        let signed = names("host;range;x-amz-content-sha256;x-amz-date");
        let get = canonical_request("GET", "/test.txt", "", &with_range, &signed, &empty);
        assert_eq!(
            sign(&key, &string_to_sign("20130524T000000Z", &scope, &get)),
            "f0e8bdb87c964420e857bd35b5d6ed310bd44f0170aba48dd91039c6036bdb41"
        );
        let signed = names("host;x-amz-content-sha256;x-amz-date");
        let list =
            canonical_request("GET", "/", "prefix=J&max-keys=2", &with_range, &signed, &empty);
        assert_eq!(
            sign(&key, &string_to_sign("20130524T000000Z", &scope, &list)),
            "34b48302e7b5fa45bde8084f4b7868a86f0a534bc59db6670ed5711ef69dc6f7"
        );
    }

    #[test]
    fn a_header_is_read_and_a_broken_one_says_what_is_missing() {
        let header = "AWS4-HMAC-SHA256 Credential=AKIA/20150830/us-east-1/sts/aws4_request, \
                      SignedHeaders=host;x-amz-date, Signature=abc";
        let read = Authorization::parse(header).unwrap();
        assert_eq!(read.access_key_id, "AKIA");
        assert_eq!(read.scope, scope("20150830", "sts"));
        assert_eq!(read.signed_headers, ["host", "x-amz-date"]);
        let error = Authorization::parse("AWS4-HMAC-SHA256 Credential=AKIA").unwrap_err();
        assert!(error.contains("5 slash-delimited"), "{error}");
        assert!(Authorization::parse("Basic abc").is_err());
    }
}
