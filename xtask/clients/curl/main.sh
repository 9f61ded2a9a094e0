#!/bin/sh
# Resolves credentials with curl, as an SDK's default chain would, and prints one line of JSON; then again for every line
# that comes in. With IMDS=v1 in the environment it asks for no session token.

# What curl says to a request, and $status.
ask() {
    answer=$(curl --silent --show-error --globoff --max-time 10 --write-out '\n%{http_code}' "$@" 2>&1)
    status=${answer##*
}
    body=${answer%
*}
}

# The container's endpoint, else IMDSv2, else IMDSv1.
resolve() {
    if [ -n "${AWS_CONTAINER_CREDENTIALS_RELATIVE_URI:-}" ]; then
        source=ecs
        ask "http://169.254.170.2$AWS_CONTAINER_CREDENTIALS_RELATIVE_URI"
    elif [ -n "${AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE:-}" ]; then
        source=container
        ask -H "Authorization: $(cat "$AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE")" "$AWS_CONTAINER_CREDENTIALS_FULL_URI"
    elif [ -n "${AWS_CONTAINER_AUTHORIZATION_TOKEN:-}" ]; then
        source=container
        ask -H "Authorization: $AWS_CONTAINER_AUTHORIZATION_TOKEN" "$AWS_CONTAINER_CREDENTIALS_FULL_URI"
    elif [ -n "${AWS_CONTAINER_CREDENTIALS_FULL_URI:-}" ]; then
        source=container
        ask "$AWS_CONTAINER_CREDENTIALS_FULL_URI"
    else
        imds
    fi
}

imds() {
    host=169.254.169.254
    [ "${AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE:-}" = IPv6 ] && host='[fd00:ec2::254]'
    roles=http://$host/latest/meta-data/iam/security-credentials/
    source=IMDSv2
    status=405
    [ "${IMDS:-}" = v1 ] || ask -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600' "http://$host/latest/api/token"
    case $status in
    200) set -- -H "X-aws-ec2-metadata-token: $body" ;;
    403 | 404 | 405) source=IMDSv1 && set -- ;;
    *) return ;;
    esac
    ask "$@" "$roles"
    [ "$status" = 200 ] && ask "$@" "$roles$body"
}

version=$(curl --version | cut -d ' ' -f 1-2 | head -n 1)
while
    began=$(date +%s%3N)
    resolve
    printf '{"version":"%s","source":"%s","ms":%s,' "$version" "$source" $(($(date +%s%3N) - began))
    key=$(printf %s "$body" | sed -n 's/.*"AccessKeyId" *: *"\([A-Z0-9]*\)".*/\1/p')
    if [ "$status" = 200 ] && [ -n "$key" ]; then
        printf '"access_key_id":"%s"}\n' "$key"
    else
        printf '"error":"HTTP %s: %s"}\n' "$status" "$(printf %s "$body" | tr '"\\\n\r\t' "'/   ")"
    fi
    read -r _
do :; done
