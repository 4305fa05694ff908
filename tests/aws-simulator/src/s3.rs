//! As much of S3 as terraform's backend needs, behind the same credentials.
//!
//! It stands here so that a test can prove whose credentials reached terraform: the bucket lets
//! in nobody but sessions of the roles it names, and every request's signature is verified.

mod chunked;
pub(crate) mod objects;

use std::borrow::Cow;

use aws_lc_rs::digest;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use axum::response::Response;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::Timestamp;

use crate::credentials::{self, Caller, Incoming, Principal, SignatureChain, header};
use crate::encoding::{Form, Keep, element, percent_decode, uri_encode};
use crate::errors::Refusal;
use crate::sigv4;
use crate::state::State;

use self::objects::Object;

/// What a request asks of S3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operation {
    HeadBucket,
    ListObjectsV2,
    GetObject,
    HeadObject,
    PutObject,
    DeleteObject,
    Unknown,
}

/// Why S3 refuses.
#[derive(Debug)]
pub(crate) enum Denied {
    /// The sender is not known, or a fault says so.
    Signature(Refusal),
    NotAllowed {
        caller: String,
        operation: Operation,
        resource: String,
    },
    NoSuchBucket,
    NoSuchKey,
    PreconditionFailed,
    BodyDiffers,
    ChecksumDiffers,
    BrokenChunks,
    RangeOutside,
    NotImplemented,
}

/// An accepted request's answer.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    status: StatusCode,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
}

/// An answer together with who was found to have asked.
pub(crate) struct Judged {
    pub(crate) caller: Option<String>,
    pub(crate) reply: Result<Reply, Denied>,
}

/// Judges a request and performs it.
pub(crate) fn judge(state: &mut State, request: &Incoming, now: Timestamp) -> Judged {
    let given_hash = header(&request.headers, "x-amz-content-sha256").unwrap_or("");
    let verified =
        credentials::verify(&state.world, &state.sessions, request, "s3", given_hash, now);
    match verified {
        Ok(verified) => Judged {
            caller: Some(verified.caller.arn()),
            reply: plain_body(request, given_hash, &verified.chain)
                .and_then(|body| perform(state, request, &verified.caller, body, now)),
        },
        Err(refusal) => Judged { caller: None, reply: Err(Denied::Signature(refusal)) },
    }
}

fn perform(
    state: &mut State,
    request: &Incoming,
    caller: &Caller,
    body: Vec<u8>,
    now: Timestamp,
) -> Result<Reply, Denied> {
    let operation = Operation::of(request);
    let (bucket, key) = place(request);
    authorize(state, caller, operation, &bucket, &key)?;
    let objects = &mut state.objects;
    match operation {
        Operation::HeadBucket => Ok(Reply::default()),
        Operation::ListObjectsV2 => {
            let form = Form::parse(request.uri.query().unwrap_or(""));
            Ok(Reply::xml(list(objects, &bucket, &form)))
        }
        Operation::GetObject | Operation::HeadObject => {
            let object = objects.fetch(&bucket, &key).ok_or(Denied::NoSuchKey)?;
            object_reply(object, header(&request.headers, "range"))
        }
        Operation::PutObject => {
            check_sha256(&request.headers, &body)?;
            let taken = objects.fetch(&bucket, &key).is_some();
            if taken && header(&request.headers, "if-none-match") == Some("*") {
                return Err(Denied::PreconditionFailed);
            }
            let kind = header(&request.headers, "content-type").unwrap_or("binary/octet-stream");
            let object = Object::new(body, kind, now);
            let etag = object.etag.clone();
            objects.put(&bucket, &key, object);
            Ok(Reply { headers: vec![("etag", etag)], ..Reply::default() })
        }
        Operation::DeleteObject => {
            objects.delete(&bucket, &key);
            Ok(Reply { status: StatusCode::NO_CONTENT, ..Reply::default() })
        }
        Operation::Unknown => Err(Denied::NotImplemented),
    }
}

/// Lets in sessions of the roles that the bucket names, and nobody else.
fn authorize(
    state: &State,
    caller: &Caller,
    operation: Operation,
    bucket: &str,
    key: &str,
) -> Result<(), Denied> {
    let policy = state.world.bucket(bucket).ok_or(Denied::NoSuchBucket)?;
    let allowed = match &caller.principal {
        Principal::AssumedRole { .. } => policy.allowed_roles.contains(&caller.principal_arn()),
        Principal::User { .. } => false,
    };
    if allowed {
        return Ok(());
    }
    let resource = if key.is_empty() {
        format!("arn:{}:s3:::{bucket}", caller.partition)
    } else {
        format!("arn:{}:s3:::{bucket}/{key}", caller.partition)
    };
    Err(Denied::NotAllowed { caller: caller.arn(), operation, resource })
}

/// Takes the body out of its transfer form, and checks that it is what was signed.
fn plain_body(
    request: &Incoming,
    given_hash: &str,
    chain: &SignatureChain,
) -> Result<Vec<u8>, Denied> {
    match given_hash {
        "UNSIGNED-PAYLOAD" => Ok(request.body.to_vec()),
        "STREAMING-UNSIGNED-PAYLOAD-TRAILER" => chunked::decode(&request.body, None),
        "STREAMING-AWS4-HMAC-SHA256-PAYLOAD" | "STREAMING-AWS4-HMAC-SHA256-PAYLOAD-TRAILER" => {
            chunked::decode(&request.body, Some(chain))
        }
        hash if hash == sigv4::sha256_hex(&request.body) => Ok(request.body.to_vec()),
        _ => Err(Denied::BodyDiffers),
    }
}

fn check_sha256(headers: &HeaderMap, body: &[u8]) -> Result<(), Denied> {
    let Some(given) = header(headers, "x-amz-checksum-sha256") else { return Ok(()) };
    let right = STANDARD.encode(digest::digest(&digest::SHA256, body));
    if given == right { Ok(()) } else { Err(Denied::ChecksumDiffers) }
}

/// Splits the path into bucket and key.
fn place(request: &Incoming) -> (String, String) {
    let path = percent_decode(request.uri.path().trim_start_matches('/'));
    let path = String::from_utf8_lossy(&path).into_owned();
    match path.split_once('/') {
        Some((bucket, key)) => (bucket.to_owned(), key.to_owned()),
        None => (path, String::new()),
    }
}

fn list(objects: &objects::Objects, bucket: &str, form: &Form) -> String {
    let prefix = form.value("prefix").unwrap_or("");
    let encode = |key: &str| match form.value("encoding-type") {
        Some("url") => uri_encode(key.as_bytes(), Keep::Slash),
        Some(_) | None => key.to_owned(),
    };
    let found: Vec<String> = objects
        .list(bucket, prefix)
        .map(|(key, object)| {
            format!(
                "<Contents>{}{}{}{}<StorageClass>STANDARD</StorageClass></Contents>",
                element("Key", &encode(key)),
                element("LastModified", &object.modified.to_string()),
                element("ETag", &object.etag),
                element("Size", &object.body.len().to_string()),
            )
        })
        .collect();
    format!(
        "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<ListBucketResult \
         xmlns=\"http://s3.amazonaws.com/doc/2006-03-01/\">{}{}{}<MaxKeys>1000</MaxKeys>\
         <IsTruncated>false</IsTruncated>{}</ListBucketResult>",
        element("Name", bucket),
        element("Prefix", &encode(prefix)),
        element("KeyCount", &found.len().to_string()),
        found.concat(),
    )
}

fn object_reply(object: &Object, range: Option<&str>) -> Result<Reply, Denied> {
    let mut headers = vec![
        ("etag", object.etag.clone()),
        ("content-type", object.kind.clone()),
        ("accept-ranges", "bytes".to_owned()),
        ("last-modified", object.modified.strftime("%a, %d %b %Y %H:%M:%S GMT").to_string()),
    ];
    let Some((first, last)) = range.and_then(parse_range) else {
        return Ok(Reply { headers, body: object.body.clone(), ..Reply::default() });
    };
    let length = object.body.len();
    if first >= length {
        return Err(Denied::RangeOutside);
    }
    let last = last.min(length - 1);
    headers.push(("content-range", format!("bytes {first}-{last}/{length}")));
    let body = object.body.get(first..=last).ok_or(Denied::RangeOutside)?.to_vec();
    Ok(Reply { status: StatusCode::PARTIAL_CONTENT, headers, body })
}

fn parse_range(text: &str) -> Option<(usize, usize)> {
    let (first, last) = text.strip_prefix("bytes=")?.split_once('-')?;
    let last = if last.is_empty() { usize::MAX } else { last.parse().ok()? };
    Some((first.parse().ok()?, last))
}

impl Operation {
    /// Reads what is asked from method, path and query.
    pub(crate) fn of(request: &Incoming) -> Self {
        let (_, key) = place(request);
        let form = Form::parse(request.uri.query().unwrap_or(""));
        let plain = request
            .uri
            .query()
            .unwrap_or("")
            .split('&')
            .all(|member| member.is_empty() || member.starts_with("x-id="));
        let in_bucket = key.is_empty();
        match request.method {
            Method::HEAD if in_bucket && plain => Self::HeadBucket,
            Method::GET if in_bucket && form.value("list-type") == Some("2") => Self::ListObjectsV2,
            Method::GET if !in_bucket && plain => Self::GetObject,
            Method::HEAD if !in_bucket && plain => Self::HeadObject,
            Method::PUT if !in_bucket && plain => Self::PutObject,
            Method::DELETE if !in_bucket && plain => Self::DeleteObject,
            _ => Self::Unknown,
        }
    }

    /// Names the operation as AWS does.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::HeadBucket => "HeadBucket",
            Self::ListObjectsV2 => "ListObjectsV2",
            Self::GetObject => "GetObject",
            Self::HeadObject => "HeadObject",
            Self::PutObject => "PutObject",
            Self::DeleteObject => "DeleteObject",
            Self::Unknown => "Unknown",
        }
    }

    /// Names the right that a policy grants for it.
    fn right(self) -> &'static str {
        match self {
            Self::HeadBucket | Self::ListObjectsV2 => "s3:ListBucket",
            Self::GetObject | Self::HeadObject => "s3:GetObject",
            Self::PutObject => "s3:PutObject",
            Self::DeleteObject => "s3:DeleteObject",
            Self::Unknown => "s3:*",
        }
    }
}

impl Denied {
    /// The code that the answer carries.
    pub(crate) fn code(&self) -> Cow<'static, str> {
        self.row().1
    }

    /// The HTTP status of the answer.
    pub(crate) fn status(&self) -> u16 {
        self.row().0
    }

    /// Writes the answer's body as S3 does.
    pub(crate) fn body(&self, request_id: &str) -> String {
        let (_, code, message) = self.row();
        format!(
            "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n<Error>{}{}{}</Error>",
            element("Code", &code),
            element("Message", &message),
            element("RequestId", request_id),
        )
    }

    fn row(&self) -> (u16, Cow<'static, str>, Cow<'static, str>) {
        let fixed = |status, code: &'static str, message: &'static str| {
            (status, Cow::from(code), Cow::from(message))
        };
        match self {
            Self::Signature(Refusal::InvalidToken) => fixed(
                403,
                "InvalidAccessKeyId",
                "The AWS Access Key Id you provided does not exist in our records.",
            ),
            Self::Signature(Refusal::Unsigned) => fixed(403, "AccessDenied", "Access Denied"),
            Self::Signature(Refusal::ExpiredToken) => {
                fixed(400, "ExpiredToken", "The provided token has expired.")
            }
            Self::Signature(Refusal::SignedTooEarly { .. } | Refusal::SignedTooLate { .. }) => {
                fixed(
                    403,
                    "RequestTimeTooSkewed",
                    "The difference between the request time and the current time is too large.",
                )
            }
            Self::Signature(Refusal::Throttled) => {
                fixed(503, "SlowDown", "Please reduce your request rate.")
            }
            Self::Signature(Refusal::InternalFailure) => {
                fixed(500, "InternalError", "We encountered an internal error. Please try again.")
            }
            Self::Signature(other) => {
                let row = other.row();
                (row.status, row.code, row.message)
            }
            Self::NotAllowed { caller, operation, resource } => {
                let right = operation.right();
                let message = format!(
                    "User: {caller} is not authorized to perform: {right} on resource: \
                     \"{resource}\" because no resource-based policy allows the {right} action"
                );
                (403, Cow::from("AccessDenied"), Cow::from(message))
            }
            Self::NoSuchBucket => fixed(404, "NoSuchBucket", "The specified bucket does not exist"),
            Self::NoSuchKey => fixed(404, "NoSuchKey", "The specified key does not exist."),
            Self::PreconditionFailed => fixed(
                412,
                "PreconditionFailed",
                "At least one of the pre-conditions you specified did not hold",
            ),
            Self::BodyDiffers => fixed(
                400,
                "XAmzContentSHA256Mismatch",
                "The provided 'x-amz-content-sha256' header does not match what was computed.",
            ),
            Self::ChecksumDiffers => {
                fixed(400, "BadDigest", "The SHA256 you specified did not match what we received.")
            }
            Self::BrokenChunks => {
                fixed(400, "IncompleteBody", "The request body terminated unexpectedly")
            }
            Self::RangeOutside => {
                fixed(416, "InvalidRange", "The requested range is not satisfiable")
            }
            Self::NotImplemented => fixed(
                501,
                "NotImplemented",
                "A header or query you provided implies functionality that is not implemented",
            ),
        }
    }
}

impl Reply {
    fn xml(body: String) -> Self {
        Self {
            headers: vec![("content-type", "application/xml".to_owned())],
            body: body.into_bytes(),
            ..Self::default()
        }
    }

    /// Turns the reply into what the server sends.
    pub(crate) fn into_response(self, request_id: &str) -> Response {
        // A HEAD carries the body as well: the transport takes its length and drops it.
        let mut response = Response::new(Body::from(self.body));
        *response.status_mut() = self.status;
        let id = ("x-amz-request-id", request_id.to_owned());
        for (name, value) in self.headers.into_iter().chain([id]) {
            if let Ok(value) = HeaderValue::from_str(&value) {
                response.headers_mut().insert(HeaderName::from_static(name), value);
            }
        }
        response
    }
}
