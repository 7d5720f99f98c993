-- Issues a number above every one before and sets members to it. KEYS: the watermarks. ARGV: the highest number the
-- caller knows, how many members are kept, members. Numbers are microseconds, or ahead of them: below 2^53, so exact.
local key, most = KEYS[1], tonumber(ARGV[2])
local time = redis.call('TIME')
local top = redis.pcall('ZRANGE', key, -1, -1, 'WITHSCORES')
if top.err then
    redis.call('UNLINK', key)
    top = {}
end
local number = math.max(time[1] * 1000000 + time[2], tonumber(ARGV[1]) + 1, (tonumber(top[2]) or 0) + 1)
local score = string.format('%.0f', number)
if not top[1] then
    -- Never there, or lost: everything older is dead.
    redis.call('ZADD', key, score, '*')
end
for index = 3, #ARGV do
    redis.call('ZADD', key, 'GT', score, ARGV[index])
end
while redis.call('ZCARD', key) > most do
    -- The lowest goes into the floor, which kills a little too much.
    local lowest = redis.call('ZRANGE', key, 0, 1, 'WITHSCORES')
    local at = lowest[1] == '*' and 3 or 1
    redis.call('ZREM', key, lowest[at])
    redis.call('ZADD', key, 'GT', lowest[at + 1], '*')
end
return score
