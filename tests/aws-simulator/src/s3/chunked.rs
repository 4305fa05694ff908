//! The `aws-chunked` transfer form: sized chunks, signed or not, and trailers.
//!
//! ```text
//! 400;chunk-signature=…\r\n  <1024 bytes>\r\n  0;chunk-signature=…\r\n
//! x-amz-checksum-crc32:…\r\n  x-amz-trailer-signature:…\r\n  \r\n
//! ```

use super::Denied;
use crate::credentials::SignatureChain;
use crate::errors::Refusal;
use crate::sigv4;

/// Takes the chunks apart; with a chain, verifies each signature.
pub(super) fn decode(body: &[u8], chain: Option<&SignatureChain>) -> Result<Vec<u8>, Denied> {
    let mut plain = Vec::new();
    let mut rest = body;
    let mut previous = chain.map(|chain| chain.signature.clone()).unwrap_or_default();
    loop {
        let head = line(&mut rest)?;
        let (size, signature) = match head.split_once(";chunk-signature=") {
            Some((size, signature)) => (size, Some(signature)),
            None => (head, None),
        };
        let size = usize::from_str_radix(size, 16).map_err(|_| Denied::BrokenChunks)?;
        let chunk = rest.get(..size).ok_or(Denied::BrokenChunks)?;
        if let Some(chain) = chain {
            let text = sigv4::chunk_string_to_sign(&chain.time, &chain.scope, &previous, chunk);
            previous = check(chain, &text, signature)?;
        }
        if size == 0 {
            break;
        }
        plain.extend_from_slice(chunk);
        rest = rest[size..].strip_prefix(b"\r\n").ok_or(Denied::BrokenChunks)?;
    }
    trailers(rest, chain, &previous)?;
    Ok(plain)
}

fn trailers(mut rest: &[u8], chain: Option<&SignatureChain>, previous: &str) -> Result<(), Denied> {
    let mut signed = String::new();
    while !rest.is_empty() {
        let text = line(&mut rest)?;
        if text.is_empty() {
            break;
        }
        let (name, value) = text.split_once(':').ok_or(Denied::BrokenChunks)?;
        match chain {
            Some(chain) if name == "x-amz-trailer-signature" => {
                let text = sigv4::trailer_string_to_sign(
                    &chain.time,
                    &chain.scope,
                    previous,
                    signed.as_bytes(),
                );
                check(chain, &text, Some(value.trim()))?;
            }
            Some(_) | None => signed.push_str(&format!("{name}:{}\n", value.trim())),
        }
    }
    Ok(())
}

fn check(chain: &SignatureChain, text: &str, given: Option<&str>) -> Result<String, Denied> {
    let given = given.ok_or(Denied::BrokenChunks)?;
    if sigv4::verify(&chain.key, text, given) {
        Ok(given.to_owned())
    } else {
        Err(Denied::Signature(Refusal::WrongSecret))
    }
}

fn line<'a>(rest: &mut &'a [u8]) -> Result<&'a str, Denied> {
    let end = rest.windows(2).position(|pair| pair == b"\r\n").ok_or(Denied::BrokenChunks)?;
    let text = std::str::from_utf8(&rest[..end]).map_err(|_| Denied::BrokenChunks)?;
    *rest = &rest[end + 2..];
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sigv4::{Scope, signing_key};

    /// The example that AWS publishes for chunked uploads: 66,560 times the letter a.
    fn published() -> (Vec<u8>, SignatureChain) {
        let scope = Scope {
            date: "20130524".to_owned(),
            region: "us-east-1".to_owned(),
            service: "s3".to_owned(),
        };
        let chain = SignatureChain {
            key: signing_key("wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", &scope),
            time: "20130524T000000Z".to_owned(),
            scope,
            signature: "4f232c4386841ef735655705268965c44a0e4690baa4adea153f7db9fa80a0a9"
                .to_owned(),
        };
        let mut body = Vec::new();
        for (size, signature) in [
            (65_536, "ad80c730a21e5b8d04586a2213dd63b9a0e99e0e2307b0ade35a65485a288648"),
            (1024, "0055627c9e194cb4542bae2aa5492e3c1575bbb81b612b7d234b86a503ef5497"),
            (0, "b6c6ea8a5354eaf15b3cb7646744f4275b71ea724fed81ceb9323e279d449df9"),
        ] {
            body.extend(format!("{size:x};chunk-signature={signature}\r\n").bytes());
            body.extend(std::iter::repeat_n(b'a', size));
            body.extend(b"\r\n");
        }
        (body, chain)
    }

    #[test]
    fn the_published_chunked_upload_is_verified() {
        let (body, chain) = published();
        assert_eq!(decode(&body, Some(&chain)).unwrap(), vec![b'a'; 66_560]);
    }

    #[test]
    fn a_changed_chunk_is_refused() {
        let (mut body, chain) = published();
        body[200] = b'b';
        let refused = decode(&body, Some(&chain));
        assert!(matches!(refused, Err(Denied::Signature(Refusal::WrongSecret))));
    }

    #[test]
    fn an_unsigned_body_with_a_trailer_is_taken_apart() {
        let body = b"3\r\nabc\r\n2\r\nde\r\n0\r\nx-amz-checksum-crc32:hYfQ8w==\r\n\r\n";
        assert_eq!(decode(body, None).unwrap(), b"abcde");
    }

    #[test]
    fn a_body_that_ends_early_is_refused() {
        for body in ["", "5\r\nabc", "zz\r\n", "3\r\nabc"] {
            assert!(matches!(decode(body.as_bytes(), None), Err(Denied::BrokenChunks)), "{body}");
        }
    }
}
