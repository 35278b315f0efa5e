/* The far side of a measurement, so light that it is never the limit. Speaks MQTT 3.1.1; far.py does the same slowly.
 *
 *     far subscribe PORT COUNT                                receives COUNT messages on bench/#
 *     far publish PORT COUNT QOS TOPICS WINDOW                sends COUNT messages, to bench/<number>/event in turn
 *
 * Prints "ready" when it is connected, and at the end the time of the last message, in seconds since the epoch.
 * The publisher reads the payload, one line, from stdin, and begins at the next line. Each envelope has an id of its own.
 */
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

enum { CONNACK = 0x20, PUBLISH = 0x30, PUBACK = 0x40, SUBACK = 0x90 };
enum { BUFFER = 4 << 20, BATCH = 64 << 10, ID_DIGITS = 32 };

static int fd;
static unsigned char in[BUFFER], out[BUFFER];
static size_t in_start, in_end, out_size;

static void fail(const char *what) {
    perror(what);
    exit(1);
}

static void flush_out(void) {
    for (size_t sent = 0; sent < out_size;) {
        ssize_t size = write(fd, out + sent, out_size - sent);
        if (size <= 0) fail("write");
        sent += (size_t)size;
    }
    out_size = 0;
}

static void put(const void *bytes, size_t size) {
    memcpy(out + out_size, bytes, size);
    out_size += size;
}

static void put_uint16(unsigned value) { put((unsigned char[]){value >> 8, value & 255}, 2); }

static void put_header(unsigned first, size_t length) {
    out[out_size++] = first;
    for (; length > 127; length >>= 7) out[out_size++] = (length & 127) | 128;
    out[out_size++] = length;
}

/* The first byte of the next packet, which is skipped; 0 if it has not arrived and is not to be waited for. */
static unsigned next_packet(int flags) {
    for (;;) {
        size_t length = 0, position = in_start + 1;
        for (int shift = 0; position < in_end; shift += 7) {
            length |= (size_t)(in[position] & 127) << shift;
            if (in[position++] < 128) {
                if (position + length > in_end) break;
                unsigned first = in[in_start];
                in_start = position + length;
                return first;
            }
        }
        memmove(in, in + in_start, in_end - in_start);
        in_end -= in_start;
        in_start = 0;
        ssize_t size = recv(fd, in + in_end, BUFFER - in_end, flags);
        if (size < 0 && flags) return 0;
        if (size <= 0) fail("recv");
        in_end += (size_t)size;
    }
}

static void expect(unsigned kind) {
    flush_out();
    if (next_packet(0) != kind) fail("unexpected packet");
}

static void connect_to(int port, const char *client_id) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    fd = socket(AF_INET, SOCK_STREAM, 0);
    if (connect(fd, (struct sockaddr *)&address, sizeof address)) fail("connect");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
    put_header(0x10, 12 + strlen(client_id));
    put("\0\4MQTT\4\2\0\0", 10);
    put_uint16(strlen(client_id));
    put(client_id, strlen(client_id));
    expect(CONNACK);
}

static void say(const char *line) {
    puts(line);
    fflush(stdout);
}

static void say_time(void) {
    struct timespec now;
    char line[64];
    clock_gettime(CLOCK_REALTIME, &now);
    snprintf(line, sizeof line, "%lld.%09ld", (long long)now.tv_sec, now.tv_nsec);
    say(line);
}

static void subscribe(int port, long count) {
    connect_to(port, "far-subscriber");
    put_header(0x82, 12);
    put_uint16(1);
    put("\0\7bench/#\0", 10);
    expect(SUBACK);
    say("ready");
    while (count > 0) count -= (next_packet(0) & 0xF0) == PUBLISH;
    say_time();
}

static void publish(int port, long count, unsigned qos, long topics, long window) {
    static char payload[BUFFER / 2];
    char topic[32], digits[ID_DIGITS + 1], *id;
    if (!fgets(payload, sizeof payload, stdin) || !(id = strstr(payload, "\"id\":\""))) fail("payload");
    id += strlen("\"id\":\"");
    size_t size = strcspn(payload, "\n");
    connect_to(port, "far-publisher");
    say("ready");
    if (getchar() == EOF) return;
    long open = 0;
    for (long number = 0; number < count; number++) {
        int topic_size = snprintf(topic, sizeof topic, "bench/%05ld/event", number % topics);
        snprintf(digits, sizeof digits, "%0*lx", ID_DIGITS, number);
        memcpy(id, digits, ID_DIGITS);
        put_header(PUBLISH | qos << 1, 2 + topic_size + (qos ? 2 : 0) + size);
        put_uint16(topic_size);
        put(topic, topic_size);
        if (qos) put_uint16(number % 65535 + 1);
        put(payload, size);
        if (out_size >= BATCH) flush_out();
        if (qos && ++open == window) flush_out();
        while (qos && open && next_packet(open == window ? 0 : MSG_DONTWAIT) == PUBACK) open--;
    }
    flush_out();
    for (; open > 0; open--) expect(PUBACK);
    say_time();
    put("\xe0\0", 2);
    flush_out();
}

int main(int argc, char **argv) {
    if (argc == 4 && !strcmp(argv[1], "subscribe"))
        subscribe(atoi(argv[2]), atol(argv[3]));
    else if (argc == 7 && !strcmp(argv[1], "publish"))
        publish(atoi(argv[2]), atol(argv[3]), atoi(argv[4]), atol(argv[5]), atol(argv[6]));
    else
        return 2;
    return 0;
}
